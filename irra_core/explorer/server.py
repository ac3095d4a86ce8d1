"""Voilà's words → Voilà, without an import that takes half of its start."""

import sys

if __name__ == "__main__":
    # jsonschema checks the form of web addresses by a grammar, which is parsed for a second, where this package is
    # installed. Voilà asks for no such check.
    sys.modules["rfc3987_syntax"] = None
    from voila.app import main

    main()
