"""Problem sets: which files hold one, how each format is read, and what makes a row a problem."""
