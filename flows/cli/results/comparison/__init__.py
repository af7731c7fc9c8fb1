"""Parts of `likeness compare`: samples side by side, and the judge's choice between them."""
