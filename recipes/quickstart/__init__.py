"""What `recipes/quickstart_data.py` builds the quickstart's inputs from: hand-written texts and pure functions."""
