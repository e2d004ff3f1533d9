"""Policies the method is compared with. They use nothing but the public policy contract."""
