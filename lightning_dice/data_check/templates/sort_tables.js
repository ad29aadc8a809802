// Sort a table by the column whose head is clicked: by `data-v` or text, numbers before words.
document.querySelectorAll("table.sortable").forEach(table => {
  const value = (row, i) => { const cell = row.cells[i], text = cell.dataset.v ?? cell.textContent.trim();
    return text === "" || isNaN(text) ? text : +text; };
  table.querySelectorAll("th").forEach((head, i) => { head.tabIndex = 0;
    const sort = () => { const order = head.dataset.order === "1" ? -1 : 1, body = table.tBodies[0];
      table.querySelectorAll("th").forEach(other => delete other.dataset.order); head.dataset.order = order;
      [...body.rows].sort((a, b) => { const x = value(a, i), y = value(b, i);
        return order * (typeof x === typeof y ? (x > y) - (x < y) : typeof x === "number" ? -1 : 1); })
        .forEach(row => body.append(row)); };
    head.onclick = sort; head.onkeydown = event => { if (event.key === "Enter") sort(); }; });
});
