"use strict";
for (const radio of document.querySelectorAll("input[name=axis]"))
  radio.addEventListener("change", () => document.body.classList.toggle("hours", radio.value === "hours"));

for (const button of document.querySelectorAll("th button"))
  button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0], column = head.cellIndex;
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const cell = row => row.cells[column];
    const compare = (a, b) => {
      const [x, y] = [cell(a).dataset.value, cell(b).dataset.value];
      if (x === undefined || y === undefined)
        return (x === undefined) - (y === undefined) || (down ? -1 : 1) * cell(a).textContent.localeCompare(cell(b).textContent);
      return down ? y - x : x - y;
    };
    body.append(...[...body.rows].sort(compare));
  });

const dialog = document.querySelector("dialog");
for (const button of document.querySelectorAll("figure button"))
  button.addEventListener("click", () => {
    const image = button.firstElementChild, large = dialog.querySelector("img");
    large.src = image.src;
    large.alt = image.alt;
    large.className = image.className;
    dialog.querySelector("p").textContent = button.nextElementSibling.textContent;
    dialog.showModal();
  });
dialog.addEventListener("click", () => dialog.close());
