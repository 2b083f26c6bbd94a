"""`elude catalogue`: what each feature looks like, what it does and what it is made of."""
