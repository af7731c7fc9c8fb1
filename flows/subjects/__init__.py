"""Many subjects: which there are, what became of each, and the page that shows them."""
