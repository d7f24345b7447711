"""`make matrix`: the backend's own tests over Pythons, Celerys and servers."""
