"""The signal store: one folder of immutable shards, each with a commit record, that loses nothing when killed.

``spec`` says what was measured, ``shards`` is one shard's bytes, ``ledger`` the commit records, ``lock`` the one writer,
``writer`` commits, ``signals`` reads, ``verify`` checks and repairs.
"""
