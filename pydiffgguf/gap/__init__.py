"""One gap: where the text around it goes, and the search for what fills it."""
