"""The HTTP interface: routes, authentication, and errors in OpenAI's shape."""
