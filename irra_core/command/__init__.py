"""The console script `irra`: a file per group of subcommands, and the lines that show how far long work is."""
