// Files that were chosen, dropped or pasted -> pictures that the server takes.

import { newId } from "./dom.js";

const TAKEN = new Set(["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp"]);
const QUALITY = 0.92; // of JPEG, where a picture must be written anew

export class PictureError extends Error {}

// {id, name, width, height, blob, isShrunk}; the file's own bytes unless it is beyond a limit or
// of a kind that only browsers know. Raises PictureError for what is no picture.
export async function readPicture(file, limits) {
  const bitmap = await decoded(file);
  try {
    const { width, height } = bitmap;
    const picture = { id: newId(), name: file.name || "picture.png", width, height, blob: file, isShrunk: false };
    if (!TAKEN.has(file.type)) picture.blob = await drawn(bitmap, 1, "image/png");
    return fits(picture, limits) ? picture : await shrunk(picture, bitmap, limits);
  } finally {
    bitmap.close();
  }
}

async function decoded(file) {
  try {
    return await createImageBitmap(file);
  } catch {
    throw new PictureError(file.name);
  }
}

const fits = ({ width, height, blob }, limits) =>
  width * height <= limits.max_image_pixels && blob.size <= limits.max_image_bytes;

// As large as the limits let it be; JPEG, because what is beyond them is a photograph.
async function shrunk(picture, bitmap, limits) {
  const pixels = picture.width * picture.height;
  let scale = Math.min(1, Math.sqrt(limits.max_image_pixels / pixels) * 0.999);
  let result;
  do {
    const width = Math.max(1, Math.floor(picture.width * scale));
    const height = Math.max(1, Math.floor(picture.height * scale));
    const blob = await drawn(bitmap, scale, "image/jpeg");
    result = { ...picture, width, height, blob, isShrunk: true };
    scale *= 0.8;
  } while (!fits(result, limits) && scale > 0.01);
  return result;
}

function drawn(bitmap, scale, type) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.floor(bitmap.width * scale));
  canvas.height = Math.max(1, Math.floor(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  if (type === "image/jpeg") {
    context.fillStyle = "white"; // JPEG knows no transparency and would make it black
    context.fillRect(0, 0, canvas.width, canvas.height);
  }
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, type, QUALITY));
}

export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

// Shows a picture in an <img>; its address is given back once it is shown, so that nothing piles up.
export function showBlob(image, blob) {
  const url = URL.createObjectURL(blob);
  image.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
  image.addEventListener("error", () => URL.revokeObjectURL(url), { once: true });
  image.src = url;
}
