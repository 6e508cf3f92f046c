"""Files from the Hub or a local folder: resolved to a commit, fetched, checked and linked, never copied."""
