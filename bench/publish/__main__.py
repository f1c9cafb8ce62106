"""`python -m bench.publish`: see `documents`."""

from bench.publish import documents

if __name__ == "__main__":
    documents.main()
