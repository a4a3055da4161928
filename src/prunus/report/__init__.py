"""Reports: one set of rows told as text, Markdown, plots and one offline HTML page."""
