"""Commands of the local stack: `up`, `down`, `status`, `submit`."""
