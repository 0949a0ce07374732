"""From the bytes of files to parameters in host memory: what goes where, in which parts, under which budget."""
