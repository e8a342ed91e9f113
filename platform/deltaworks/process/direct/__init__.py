"""The direct plan: an app whose documents are made of one row each needs no rows in its state.

    groups ──► last change of each key ──► steps ──► sinks, flushed ──► checkpoint
               columns, no Python per row           at least once, in ranges that a restart repeats as they were

An app has this plan when it reads one table and nothing else that must be remembered: no related or looked-up
rows, no `on_change`, `window` or `dedup`. What still has a row in the state:

| row                                    | why                                                              |
|----------------------------------------|------------------------------------------------------------------|
| of a key that is held or dead          | it is tried again from there                                     |
| as large as one that a source toasts   | a later change may come without its unchanged columns            |

Three things cannot be told without every row: a truncate, keys that swap places inside a transaction, and
an unchanged column of a row that is not there. Then the app keeps all rows from then on: it folds the log
again from its start, before it writes anything more.

reducer  ranges of changes into the newest state of each key
ranges   range after range, from the log to the sinks
plan     what the state remembers of it: the range that is on its way
places   where the rows of keys are, with hashes and sorts in columns
flags    which rows, as Arrow and NumPy have it
"""
