"""The page of `minidiffedit ui`: runs.py runs the model, visit.py holds what a visitor has, ui.py shows it."""
