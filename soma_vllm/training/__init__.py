"""Ray actors that mine, train and score. The only room that knows Ray."""
