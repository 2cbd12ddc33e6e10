"""What one looks at: the audit page, contact sheets, figures, previews."""
