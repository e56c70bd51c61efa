"""Many runs of one training recipe: which they are, how they are run, what they say together."""
