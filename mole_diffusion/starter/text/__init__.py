"""The world of the text starter: words, invented languages, facts, and the tasks that are made of them."""
