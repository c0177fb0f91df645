"""Operations of a trainer: submitting in order, polling, and merging the results of split batches."""
