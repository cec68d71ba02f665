"""Drop-in replacements for other libraries; importing a module of this package imports none of them."""
