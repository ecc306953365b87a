"""One fMRI run as the demonstration's data: frames, facts measured in them, questions about those."""
