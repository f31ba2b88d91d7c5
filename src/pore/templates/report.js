// Makes buttons of a table's headings: more first, then less first, then as it was written.
const number = /^[−+-]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?/i;

function key(row, column) {
  const text = row.cells[column].textContent.trim();
  const found = number.exec(text);
  if (found) return Number(found[0].replace("−", "-").replaceAll(",", ""));
  return ["", "-", "–", "?"].includes(text) ? null : text;
}

function compare(one, other) {
  const numbers = typeof one === "number" && typeof other === "number";
  return numbers ? one - other : String(one).localeCompare(String(other));
}

function sort(body, column, order) {
  const rows = [...body.rows].filter((row) => !row.classList.contains("budget"));
  rows.forEach((row, place) => (row.dataset.place ??= place));
  const ranked = rows.map((row) => ({ row, key: key(row, column), place: Number(row.dataset.place) }));
  ranked.sort((one, other) => {
    if (order === "none") return one.place - other.place;
    if (one.key === null || other.key === null) return (one.key === null) - (other.key === null) || one.place - other.place;
    return (order === "ascending" ? 1 : -1) * compare(one.key, other.key) || one.place - other.place;
  });
  body.append(...ranked.map(({ row }) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  if (Math.max(...[...table.tBodies].map((body) => body.querySelectorAll("tr:not(.budget)").length)) < 2) continue;
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  heads.forEach((head, column) => {
    const rows = [...table.tBodies].flatMap((body) => [...body.querySelectorAll("tr:not(.budget)")]);
    const keys = rows.map((row) => key(row, column)).filter((each) => each !== null);
    if (!keys.length) return;
    const numeric = keys.every((each) => typeof each === "number");
    const orders = numeric ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const order = orders[(orders.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
      heads.forEach((each) => each.hasAttribute("aria-sort") && each.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", order);
      for (const body of table.tBodies) sort(body, column, order);
    });
  });
}
