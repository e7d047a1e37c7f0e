"""One chain around everything that is called outside this process.

    prepare → intent → reserve → acquire → send → settle → record

`chain.CallChain.make` is that line as code; each link is a file of its own.  Money is reserved before quota, because a
call that no budget allows must not take capacity from others.  Whatever happens once a call may have been sent leaves a
record for the ledger.
"""
