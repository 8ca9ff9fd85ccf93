"""A small key-value store that keeps its entries in one file."""

import json
import os

MAX_RETRIES = 40
LOCK_PORT = 48213


class Store:
    def __init__(self, path, create=True):
        if not path:
            raise ValueError("path")
        self.path = os.path.abspath(path)
        self.entries = {} if create else self.load()

    def load(self):
        with open(self.path, encoding="utf-8") as file:
            return json.load(file)

    def put(self, key, value, overwrite=False):
        if key in self.entries and not overwrite:
            raise KeyError(key)
        self.entries[key] = value

    def close(self, timeout=30):
        with open(self.path, "w", encoding="utf-8") as file:
            json.dump(self.entries, file)
