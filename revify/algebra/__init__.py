"""The algebra of couplings: a formula is read as a program, and the program is solved for its inputs.

    formulas      a Python function       → a program
    solving       a program               → its inverse and pivots (elimination), or why not (explaining)
    determinants  the pivots              → det J
    programs      what all of them speak
    intervals     where the values of a program can lie

Pure functions of frozen records; the only tensors are those a program is run on.
"""
