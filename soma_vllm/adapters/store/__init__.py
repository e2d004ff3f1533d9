"""Where adapters are published: a directory tree or an object store, behind one protocol."""
