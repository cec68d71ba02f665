"""Drop-ins for other libraries, one module each."""
