"""Operations of a trainer: submitted in order, waited for, merged where they were split."""
