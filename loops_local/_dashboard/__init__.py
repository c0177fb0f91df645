"""The dashboard: a page that holds no data (`page.html` and what it loads), and the data that it reads."""
