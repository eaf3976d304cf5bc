"""The registry: which models can be called, under which names. Only this folder uses a database; it uses neither gRPC nor HTTP.

    registry ─┬─ rules               validates registrations
              ├─ catalog             the names of the Llama models, and which entry of a listing a name refers to
              ├─ lookup              resolves a name to a model: a registered one first, then a discovered one
              ├─ scopes              names that are reserved for a provider
              ├─ listings            the listings of the providers, as one call sees them
              ├─ pages               page sizes and page tokens
              │
              ├─ writes              writes the database first, then memory
              ├─ change_log_reader   applies the database's changes to memory ──▶ registered_index
              ├─ refresh             lists every provider periodically        ──▶ listing_cache
              ├─ view                all models, registered and discovered, and their changes
              ├─ feed                the changes, for watchers
              │
              └─ store               the registered models and the log of changes
                 ├─ database         the interface of the databases, implemented in sqlite and postgres
                 ├─ tables           the tables and their migrations
                 └─ rows             converts models to rows

`registry` is the API for other packages. `model` defines the models; `messages` formats names for error messages.
"""
