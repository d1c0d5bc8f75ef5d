"""Makes the text starter, a small T5 and its experts, from generated tasks alone."""
