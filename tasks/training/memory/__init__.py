"""Peak memory of training, predicted before anything is loaded."""
