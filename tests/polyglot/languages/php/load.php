<?php

// Loads every generated class, then writes and reads a request. Debian has no gRPC extension for PHP, so nothing is sent.

declare(strict_types=1);

use Deltawire\V1\ChatMessage;
use Deltawire\V1\ChatRequest;
use Deltawire\V1\StreamChatCompletionRequest;
use Deltawire\V1\UserMessage;

// The library sets dynamic properties, which PHP 8.2 deprecates.
set_error_handler(function (int $level, string $message, string $file, int $line): never {
    throw new ErrorException($message, 0, $level, $file, $line);
}, E_ALL & ~E_DEPRECATED);
error_reporting(E_ALL & ~E_DEPRECATED);

$folder = $argv[1];
// Debian's package has no autoloader; its folder is on PHP's include path.
set_include_path($folder . PATH_SEPARATOR . get_include_path());
spl_autoload_register(function (string $class): void {
    $file = stream_resolve_include_path(str_replace('\\', '/', $class) . '.php');
    if ($file !== false) {
        require_once $file;
    }
});

foreach (new RecursiveIteratorIterator(new RecursiveDirectoryIterator($folder)) as $file) {
    // A client class extends a class of the gRPC extension. Files such as ToolChoice_Mode.php hold the old name of a nested
    // class and warn when they are loaded.
    if ($file->getExtension() !== 'php' || preg_match('/Client\.php$|_/', $file->getFilename())) {
        continue;
    }
    $class = str_replace('/', '\\', substr($file->getPathname(), strlen($folder) + 1, -strlen('.php')));
    if (!class_exists($class)) {
        throw new RuntimeException("$class is not in $file");
    }
    if (str_starts_with($class, 'GPBMetadata')) {
        $class::initOnce();
    }
}

$user = new UserMessage(['text' => 'How warm is it in Oslo?']);
$chat = new ChatRequest(['messages' => [new ChatMessage(['user' => $user])]]);
$sent = new StreamChatCompletionRequest(['chat' => $chat]);
$received = new StreamChatCompletionRequest();
$received->mergeFromString($sent->serializeToString());
echo $received->getChat()->getMessages()[0]->getUser()->getText(), "\n";
