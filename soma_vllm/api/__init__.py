"""The HTTP surface: routes, who may ask, and errors in OpenAI's shape."""
