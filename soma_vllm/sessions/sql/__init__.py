"""Sessions and their events in SQL.

`store.SessionStore` is the way in: an append-only log of events per session, the text of those events apart,
and what sessions are found by. `queries` has its questions, `records` the values it takes and gives, `tables`
the tables, `connections` the databases, `schema` and `migrations/` how a database comes to have the tables,
`outages` what its failures are to the rest of the program; `api_keys` has the API keys.

    store = SessionStore("sqlite+aiosqlite:///sessions.db")        # or postgresql+asyncpg://user@host/database
    await store.open()                                             # makes the tables, or brings them up to date
    await store.append(key, 0, [event], SessionSnapshot(...), [TurnMark(...)])
    found = await store.find(key.tenant, family, chains)
    await store.erase_text(key)                                    # events, and how the session is found, stay
    await store.delete(key)                                        # nothing stays
    await store.close()

What an erasure reaches. SQLite: the database's file and its write-ahead log, before the call returns,
unless another process keeps reading an older state: then the next erasure, or closing, does it. PostgreSQL:
the text can no longer be read by any query, and its space is used again after autovacuum; what archives and
replicas keep of PostgreSQL's own log follows their own retention. Backups, and file systems with snapshots,
keep what they have.
"""
