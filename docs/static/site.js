// Browsers do not let a page from file:// fetch another one, which the summaries of search results need
if (location.protocol === 'file:') DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
