"""What everything uses: errors, files, ranks, commands."""
