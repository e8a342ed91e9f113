"""An app's part of the proof: what it took of the log, what left for its sinks, and where each entity stands.

ledger     the tables in the app's state, and how another process reads them
left       what left of one range, as columns
left_runs  how those are stored, and merged before they grow without bounds
left_keys  of each key the newest that left, of one ledger or of those of all members
stood      entities by minute and by where they stand: the app's side of the balance
"""
