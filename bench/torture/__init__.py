"""`make torture`: every device killed and swapped at random under a guest that checks all that it does."""
