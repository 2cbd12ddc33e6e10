"""Many edits: batches, data sets, what is measured on them."""
