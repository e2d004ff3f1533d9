"""Who is asking, and how much: access, keys and quotas."""
