"""The files that everything uses: errors, files, ranks, progress, commands."""
