// What Gradio's parts lack for a screen reader, mended whenever they come or change: a name for every button, no
// name on what may have none, no picture that says again what stands below it.
() => {
  const mend = () => {
    document.querySelectorAll("div.empty[aria-label]").forEach((one) => one.removeAttribute("aria-label"));
    document.querySelectorAll(".thumbnail-item img:not([alt=''])").forEach((one) => { one.alt = ""; });
    document.querySelectorAll("button:not([aria-label]):not([title])").forEach((one) => {
      const label = one.closest(".block")?.querySelector("[data-testid=block-label]");
      if (label && !one.textContent.trim()) one.setAttribute("aria-label", label.textContent.trim());
    });
  };
  new MutationObserver(mend).observe(document.body, {
    subtree: true, childList: true, attributes: true, attributeFilter: ["alt", "aria-label"],
  });
  mend();
}
