"""Read rows from data files, and make batches of them."""
