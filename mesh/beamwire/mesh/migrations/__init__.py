"""How the schema of a service's database came to be, one revision after the other, each with its way back."""
