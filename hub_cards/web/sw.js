// Keeps every file of the page, so that it opens without a network after the first visit.

// Publishing puts the digest of all files here: another one begins a new store.
const VERSION = "unpublished";
const STORE = `rs-transformer-${VERSION}`;
const SHELL = ["./", "index.html", "app.js", "worker.js", "style.css", "models.json"];

addEventListener("install", (event) => {
  event.waitUntil(
    caches
      .open(STORE)
      // Past the browser's own cache, which may still have the files of the page before.
      .then((store) => store.addAll(SHELL.map((url) => new Request(url, { cache: "reload" }))))
      .then(() => skipWaiting()),
  );
});

addEventListener("activate", (event) => {
  event.waitUntil(
    caches
      .keys()
      .then((names) => Promise.all(names.filter((name) => name.startsWith("rs-transformer-") && name !== STORE).map((name) => caches.delete(name))))
      .then(() => clients.claim()),
  );
});

async function answer(event) {
  const { request } = event;
  const store = await caches.open(STORE);
  const kept = await store.match(request, { ignoreSearch: true });
  if (kept) return kept;
  const fetched = await fetch(request);
  // Meanwhile the page reads on; where the store is full, it works all the same.
  if (fetched.ok) event.waitUntil(store.put(request, fetched.clone()).catch(() => {}));
  return fetched;
}

addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && new URL(url).origin === location.origin) event.respondWith(answer(event));
});
